"""What the commands are made of: archives and videos to read, devices, and results to write."""
