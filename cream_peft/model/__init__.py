"""The base in 4 bits with its RoPE scaled, the record cream.json, and adapters found, checked and loaded."""
