"""Projects."""

from sqlalchemy import Connection, Row, bindparam, select, update

from contentfactory.ids import new_id
from db.models import Project
from db.session import insert_for, now


def ensure(conn: Connection, name: str) -> str:
    """The id of the project of that name, made if it is new."""
    found: str | None = conn.execute(_NAMED, {"p_name": name}).scalar()
    if found:
        return found
    statement = insert_for(conn, Project).values(id=new_id("proj"), name=name, weight=1.0, paused=False, created_at=now())
    conn.execute(statement.on_conflict_do_nothing())
    made: str = conn.execute(_NAMED, {"p_name": name}).scalar_one()
    return made


_NAMED = select(Project.id).where(Project.name == bindparam("p_name"))


def list_all(conn: Connection) -> list[Row[tuple[str, str, float, bool]]]:
    """Id, name, weight and pause of every project."""
    return list(conn.execute(select(Project.id, Project.name, Project.weight, Project.paused).order_by(Project.name)))


def set_weight(conn: Connection, project_id: str, weight: float) -> None:
    """Set a project's weight in the fair share."""
    conn.execute(update(Project).where(Project.id == project_id).values(weight=weight))
