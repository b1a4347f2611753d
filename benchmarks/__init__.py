"""How fast calprune prunes, against the methods written plainly and against the machine's limit."""
