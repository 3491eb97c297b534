"""The demo: a small model and small tasks that the project makes itself, so that everything can be tried anywhere."""
