"""The command line: starts a broker, sends, listens, and administers a running one."""
