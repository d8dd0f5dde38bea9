"""What a caller asks for, checked against what a model can make. No torch here."""
