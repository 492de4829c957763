"""The launcher and the sweepers of -m. Hydra imports this package in every command, so it imports nothing heavy."""
