"""What a config may hold, and how a command line becomes one."""
