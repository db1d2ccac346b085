"""Who computes what where: meshes, dispatch, grouped products."""
