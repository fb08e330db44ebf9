"""The ways to a server in another process: HTTP, or the store as a mailbox."""
