"""Lightning modules and data of the recipes."""
