"""The mathematics: weights as rows, atoms, the weight update and the fast ways to compute it."""
