"""The three reference RAdams again, in numpy and float64, written from their sources.

Each module has `trajectory(x0, grads, **settings)`: the parameter after every update. They share
no code with the package or with each other, on purpose.
"""
