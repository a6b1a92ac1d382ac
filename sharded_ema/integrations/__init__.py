"""One module for each training stack; each imports the package it is named after, and is imported
only by who uses that."""
