import pytest
from django.core.management import call_command


@pytest.mark.django_db
def test_models_and_migrations_agree(capsys):
    try:
        call_command("makemigrations", "django_durable", check=True, dry_run=True)
    except SystemExit:
        pytest.fail(f"A migration is missing:\n{capsys.readouterr().out}", pytrace=False)
