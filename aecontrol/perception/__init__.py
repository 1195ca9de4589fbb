"""What the frames mean: atoms, lattices, defects, embeddings and scalar targets."""
