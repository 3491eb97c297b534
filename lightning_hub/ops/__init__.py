"""The kernels: packed rows, attention that stays inside a document, the loss head."""
