"""The one matching loop, its objectives, optimizers, parametrizations, priors and recipes."""
