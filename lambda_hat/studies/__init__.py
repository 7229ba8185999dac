"""What every wing does: tables, plots, pages, commands."""
