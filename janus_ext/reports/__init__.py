"""What is shown of results: tables in the terminal, pictures, one page for many runs."""
