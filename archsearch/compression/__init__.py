"""Deep Compression: prune, share weights, code them; a file that decodes to the very weights."""
