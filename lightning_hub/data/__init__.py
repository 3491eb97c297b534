"""Formats to conversations, token ids and labels, packed rows and optimizer steps."""
