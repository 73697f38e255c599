from sdtune.cli import main

main()
