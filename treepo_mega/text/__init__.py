"""Pure rules about response text, which stopping and grading share. Standard library only."""
