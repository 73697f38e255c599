"""What a person may ask for: every option declared once, and how options are read. Imports nothing of sdtune."""
