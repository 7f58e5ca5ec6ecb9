"""Write files and folders completely or not at all, and read untrusted files. Imports no torch."""
