"""Language models: loading, their matrices and layers, and the files that they are stored in."""
