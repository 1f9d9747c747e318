"""`python -m owl_deploy`."""

from owl_deploy.cli import main

if __name__ == "__main__":
    main()
