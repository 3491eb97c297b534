"""Launching: flags, run folders and attempts, the environment of a process, the topology, and local ranks."""
