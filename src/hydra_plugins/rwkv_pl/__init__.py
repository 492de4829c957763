"""The launcher and the sweepers of -m, where Hydra looks for such things. Nothing heavy is imported here."""
