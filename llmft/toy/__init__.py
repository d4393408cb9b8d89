"""The offline model and the script that trained it."""
