"""The verbs of the command line, one module each. They are light: what needs torch is imported when it is used."""
