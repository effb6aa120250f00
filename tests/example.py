"""A rule file with a test, as the format's page has it."""

DESIGN = """
version: 1
caches:
  user: {key: "shop:prod:user:{id}"}
  dashboard: {key: "shop:prod:user:{id}:dash:v{version}", version: "shop:prod:user:{id}:dash:ver"}
  team-members: {key: "shop:prod:team:{team_id}:members:v{version}", version: "shop:prod:team:{team_id}:members:ver"}
rules:
  - name: user-changed
    table: public.users
    columns: [name, email, plan]
    when: "op != 'update' || new.plan != old.plan"
    bust:
      - user
      - dashboard
      - team-members:
          via: SELECT team_id FROM public.team_members WHERE user_id = {id}
tests:
  - name: renaming a user busts the profile and the team lists
    change: {table: public.users, op: update, old: {id: 42, name: Ada}, new: {id: 42, name: Grace}}
    via: {team-members: [{team_id: 7}, {team_id: 9}]}
    busts: ["shop:prod:user:42", "bump shop:prod:team:7:members:ver", "bump shop:prod:team:9:members:ver",
            "bump shop:prod:user:42:dash:ver"]
"""
