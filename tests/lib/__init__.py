"""Code that several tests share. No test file imports another test file."""
