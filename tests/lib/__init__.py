"""Code that several tests share. No test imports another one."""
