"""The command `gradaudit`."""
