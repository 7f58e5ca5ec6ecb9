"""Rules say which weights get which method: their text, and what it means."""
