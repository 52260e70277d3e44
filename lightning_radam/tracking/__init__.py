"""Where the numbers go: Weights & Biases, and a picture for people without an account."""
