"""Flow matching: path and sigma grids, solvers, sampling of chains, recorded trajectories."""
