"""What stands in the client half for the part that was cut out: its skeleton, without values."""
