"""What each verb of the command does: one module for each, imported when it is asked for."""
