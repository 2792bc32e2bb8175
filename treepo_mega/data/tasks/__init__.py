"""Task generators that ship with the project; each is pure Python and makes its own held-out split."""
