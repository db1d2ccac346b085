"""What is computed where: meshes, dispatch, grouped products."""
