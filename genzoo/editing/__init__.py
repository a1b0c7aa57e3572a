"""Samples of the posterior of a linear inverse problem with a trained model of any family."""
