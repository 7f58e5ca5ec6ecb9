"""Files and folders that are whole or not there, and reading what strangers wrote. Imports no torch."""
