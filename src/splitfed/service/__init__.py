"""The ways to a server in another process: over HTTP, or through the store as a mailbox."""
