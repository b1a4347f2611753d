"""Real text: corpora, and the prefixes and windows that are cut from them."""
