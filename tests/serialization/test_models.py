"""Model instances: stored by reference, read again on replay."""

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.db import OperationalError, models

from django_durable.exceptions import SerializationError
from django_durable.serialization import dumps, loads

pytestmark = pytest.mark.django_db


class ProxyUser(User):
    class Meta:
        proxy = True
        app_label = "auth"


@pytest.fixture
def group():
    return Group.objects.create(name="staff")


def test_an_instance_is_read_again_as_it_is_then(group):
    text = dumps({"who": [group]})
    Group.objects.update(name="renamed")
    back = loads(text)["who"][0]
    assert type(back) is Group
    assert back == group
    assert back.name == "renamed"
    assert back._state.db == "default"
    assert "staff" not in text


def test_storing_a_loaded_instance_asks_the_database_nothing(group, django_assert_num_queries):
    with django_assert_num_queries(0):
        text = dumps([group])
    with django_assert_num_queries(1):
        loads(text)


def test_deferred_and_proxy_instances_keep_their_class():
    user = User.objects.create(username="ann")
    assert loads(dumps(User.objects.only("pk").get())) == user
    assert type(loads(dumps(ProxyUser.objects.get()))) is ProxyUser


def test_a_row_hidden_by_the_default_manager_is_still_found(group, monkeypatch):
    class Nobody(models.Manager):
        def get_queryset(self):
            return super().get_queryset().none()

    hidden = Nobody()
    hidden.model = Group
    monkeypatch.setattr(Group._meta, "default_manager", hidden)
    assert not Group._default_manager.exists()
    assert loads(dumps(group)) == group


def test_a_row_that_is_gone_is_named(group):
    text, pk = dumps(group), group.pk
    Group.objects.all().delete()
    with pytest.raises(SerializationError, match=rf"auth\.Group with primary key {pk} does not exist.*deleted"):
        loads(text)


def test_a_deleted_instance_cannot_be_stored(group):
    group.delete()
    with pytest.raises(SerializationError, match=r"value is a auth\.Group that is not in the database. Save it first"):
        dumps(group)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"$":"model","m":"auth.Gone","v":1,"db":"default"}', "'auth.Gone', which is not installed"),
        ('{"$":"model","m":"nonsense","v":1,"db":"default"}', "'nonsense', which is not installed"),
        ('{"$":"model","m":"gone.Group","v":1,"db":"default"}', "which is not installed"),
        ('{"$":"model","m":"auth.Group","v":1,"db":"elsewhere"}', "database 'elsewhere'"),
        ('{"$":"model","m":"auth.Group","v":"x","db":"default"}', "cannot be read"),
        ('{"$":"model","m":"auth.Group","v":{"a":[]},"db":"default"}', "cannot be read"),
        (
            '{"$":"model","m":"auth.Group","v":99999999999999999999999999,"db":"default"}',
            "does not exist|cannot be read",
        ),
        ('{"$":"model","m":"auth.Group","v":1}', "cannot be read"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(text, complaint):
    with pytest.raises(SerializationError, match=complaint):
        loads(text)


def test_a_lost_connection_is_not_blamed_on_the_value(group, monkeypatch):
    def lost(self, *args, **kwargs):
        raise OperationalError("server closed the connection")

    text = dumps(group)
    monkeypatch.setattr(models.QuerySet, "get", lost)
    with pytest.raises(OperationalError):  # so that the run is tried again, instead of failing for good
        loads(text)


def test_a_model_of_a_migration_is_refused(group):
    from django.db.migrations.state import ModelState, ProjectState

    state = ProjectState()
    for model in (Group, Permission):
        state.add_model(ModelState.from_model(model, exclude_rels=True))
    historic = state.apps.get_model("auth", "Group").objects.get()
    with pytest.raises(SerializationError, match="not an installed model"):
        dumps(historic)
