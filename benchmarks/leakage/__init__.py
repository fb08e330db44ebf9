"""What a server can learn: attacks on what crosses the cut, measured."""
