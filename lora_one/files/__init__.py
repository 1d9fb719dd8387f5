"""Write files and folders in one step, and read the files of others without trusting them."""
