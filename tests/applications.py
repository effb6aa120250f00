"""Key spaces of real applications, as far as public sources show them: tables, rows, and the keys made of these rows.

A family says what its keys are made of: a template, the tables that make it stale, and of each parameter the column.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import sql

ROWS: Final = 60
_ZBASE32: Final = "ybndrfg8ejkmcpqxot1uwisza345h769"
_WORDS: Final = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "islet",
    "jetty",
    "knoll",
    "lotus",
]


@dataclass(frozen=True)
class KeyFamily:
    """``key``: the template, with the columns of ``table``; ``others``: tables that make it stale too.

    ``<email|sha1>``: a digest of a column; ``<name|lower>``: in lower case.
    """

    key: str
    table: str = ""
    others: tuple[str, ...] = ()

    @property
    def tables(self) -> set[str]:
        return {self.table, *self.others} - {""}


@dataclass(frozen=True)
class Application:
    """``tables``: by name, the columns with their types; ``id`` types: ``key``; a reference: ``-> table``.

    ``=> table`` is a reference without a foreign key.
    """

    name: str
    id_type: str
    tables: Mapping[str, str]
    families: Sequence[KeyFamily]
    constants: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _value(kind: str, column: str, rng: random.Random, number: int) -> Any:
    if kind == "text" and column in {"id", "userid"}:
        return "".join(rng.choice(_ZBASE32) for _ in range(26))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    if kind == "bigint":
        return 10**17 + rng.randrange(10**15)
    if kind == "int":
        return number + 1
    if column == "email":
        return f"{rng.choice(_WORDS)}.{rng.choice(_WORDS)}{number}@mail{number % 7}.example"
    if column in {"url", "uri"}:
        return (
            f"https://{rng.choice(_WORDS)}{number}.example/users/{rng.choice(_WORDS)}/statuses/{rng.randrange(10**9)}"
        )
    if column == "domain":
        return f"{rng.choice(_WORDS)}{number}.example"
    if kind == "boolean":
        return rng.random() < 0.5
    if column == "api_key":
        return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(32))
    if column in {"value", "credentials_id", "provision_device_key", "token"}:
        return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(20))
    if column in {"name", "title"}:
        return f"{rng.choice(_WORDS).title()} {rng.choice(_WORDS)} {number}"
    return f"{rng.choice(_WORDS)}_{rng.choice(_WORDS)}{number}" if number % 2 else f"{rng.choice(_WORDS)}{number}"


@dataclass
class Space:
    """What was made: the rows by table, and the keys by the number of their family."""

    rows: dict[str, list[dict[str, Any]]]
    keys: list[list[str]]


def make(application: Application, dsn: str, seed: int = 7) -> Space:
    """Create and fill the tables, and make the keys."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {}
    with psycopg.connect(dsn) as connection:
        for table, definition in application.tables.items():
            text, _, key = definition.partition(", PRIMARY KEY ")
            columns = [each.split(None, 1) for each in text.split(", ")]
            parts: list[sql.Composable] = []
            for name, kind in columns:
                target = kind.partition("> ")[2]
                typed = application.id_type if target or kind in {"key", "ref"} else kind
                bound = kind.startswith("->")
                reference = sql.SQL(" REFERENCES {} (id)").format(sql.Identifier(target)) if bound else sql.SQL("")
                own = " PRIMARY KEY" if kind == "key" else ""
                parts.append(sql.SQL("{} {}{}").format(sql.Identifier(name), sql.SQL(typed + own), reference))
            if key:
                names = [sql.Identifier(name) for name in key.strip("()").split(", ")]
                parts.append(sql.SQL("PRIMARY KEY ({})").format(sql.SQL(", ").join(names)))
            connection.execute(sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(table), sql.SQL(", ").join(parts)))
            rows[table] = []
            for number in range(ROWS):
                row = {}
                for name, kind in columns:
                    target = kind.partition("> ")[2]
                    if target:
                        row[name] = rng.choice(rows[target][:7] if target == "tenant" else rows[target])["id"]
                    else:
                        typed = application.id_type if kind in {"key", "ref"} else kind
                        row[name] = _value(typed, name, rng, number)
                same = [name for name in key.strip("()").split(", ") if name]
                if not same or all(any(row[name] != other[name] for name in same) for other in rows[table]):
                    rows[table].append(row)
            with connection.cursor() as cursor:
                cursor.executemany(
                    sql.SQL("INSERT INTO {} VALUES ({})").format(
                        sql.Identifier(table), sql.SQL(", ").join([sql.Placeholder()] * len(columns))
                    ),
                    [list(row.values()) for row in rows[table]],
                )
        connection.execute("ANALYZE")
    return Space(rows, [_keys(application, family, rows, rng) for family in application.families])


def _keys(
    application: Application, family: KeyFamily, rows: dict[str, list[dict[str, Any]]], rng: random.Random
) -> list[str]:
    made = []
    for row in rows.get(family.table, [{"id": number} for number in range(ROWS if "<" in family.key else 1)]):
        key = re.sub(r"<(\w+)\.(\w+)>", lambda found: str(rng.choice(rows[found[1]])[found[2]]), family.key)
        for name, form in re.findall(r"<(\w+)(\|\w+)?>", key):
            value = str(rng.choice(application.constants[name]) if name in application.constants else row[name])
            value = _FORMS[form](value)
            key = key.replace(f"<{name}{form}>", value)
        made.append(key)
    return list(dict.fromkeys(made))


_FORMS: Final[Mapping[str, Callable[[str], str]]] = {
    "": str,
    "|sha1": lambda text: hashlib.sha1(text.encode()).hexdigest(),
}
DIGEST: Final = hashlib.md5(b"settings").hexdigest()

THINGSBOARD: Final = Application(
    "thingsboard",
    "uuid",
    {
        "tenant_profile": "id key, name text",
        "tenant": "id key, tenant_profile_id -> tenant_profile, title text",
        "customer": "id key, tenant_id -> tenant, title text",
        "tb_user": "id key, tenant_id -> tenant, customer_id -> customer, email text",
        "user_settings": "user_id -> tb_user, type text, settings text, PRIMARY KEY (user_id, type)",
        "device_profile": "id key, tenant_id -> tenant, name text, provision_device_key text",
        "device": "id key, tenant_id -> tenant, customer_id -> customer, device_profile_id -> device_profile, "
        "name text",
        "device_credentials": "id key, device_id -> device, credentials_id text",
        "asset_profile": "id key, tenant_id -> tenant, name text",
        "asset": "id key, tenant_id -> tenant, asset_profile_id -> asset_profile, name text",
        "edge": "id key, tenant_id -> tenant, name text",
        "entity_view": "id key, tenant_id -> tenant, entity_id -> device, name text",
        "relation": "from_id -> device, to_id -> asset, relation_type text, relation_type_group text, "
        "PRIMARY KEY (from_id, to_id, relation_type)",
        "attribute_kv": "entity_id -> device, attribute_type int, attribute_key int",
        "ota_package": "id key, tenant_id -> tenant, title text, data text",
        "dashboard": "id key, tenant_id -> tenant, title text",
        "resource": "id key, tenant_id -> tenant, title text",
        "alarm_types": "tenant_id -> tenant, type text, PRIMARY KEY (tenant_id, type)",
        "qr_code_settings": "id key, tenant_id -> tenant, settings text",
        "api_key": "id key, tenant_id -> tenant, user_id -> tb_user, value text",
        "ai_model": "id key, tenant_id -> tenant, name text",
        "admin_settings": "id key, tenant_id -> tenant, key text, json_value text",
    },
    [
        KeyFamily("devices<id>", "device"),
        KeyFamily("devices<tenant_id>_<id>", "device"),
        KeyFamily("devices<tenant_id>_n_<name>", "device"),
        KeyFamily("deviceCredentials<credentials_id>", "device_credentials"),
        KeyFamily("deviceProfiles<id>", "device_profile"),
        KeyFamily("deviceProfiles<tenant_id>_<name>", "device_profile"),
        KeyFamily("deviceProfiles<tenant_id>", "device_profile"),
        KeyFamily("deviceProfiles<provision_device_key>", "device_profile"),
        KeyFamily("assets<tenant_id>_<name>", "asset"),
        KeyFamily("assetProfiles<id>", "asset_profile"),
        KeyFamily("assetProfiles<tenant_id>_<name>", "asset_profile"),
        KeyFamily("customers<tenant_id>_<title>", "customer"),
        KeyFamily("users<tenant_id>_<email>", "tb_user"),
        KeyFamily("userSettings<user_id>_<SETTING>", "user_settings"),
        KeyFamily("edges<tenant_id>_<name>", "edge"),
        KeyFamily("relatedEdges{<tenant_id>}<device.id>", "edge", ("relation",)),
        KeyFamily("relations<from_id>_<to_id>_Contains_COMMON", "relation"),
        KeyFamily("relations<from_id>_Contains_COMMON_FROM", "relation"),
        KeyFamily("relations<to_id>_COMMON_TO", "relation"),
        KeyFamily("entityViews<id>", "entity_view"),
        KeyFamily("entityViews<tenant_id>_n_<name>", "entity_view"),
        KeyFamily("entityViews<tenant_id>_<entity_id>", "entity_view"),
        KeyFamily("tenants<id>", "tenant"),
        KeyFamily("tenantsExist<id>", "tenant"),
        KeyFamily("tenantProfiles<id>", "tenant_profile"),
        KeyFamily("tenantProfilesdefault", "", ("tenant_profile",)),
        KeyFamily("attributes{<entity_id>}SERVER_SCOPE_<ATTRIBUTE>", "attribute_kv"),
        KeyFamily("otaPackages<id>", "ota_package"),
        KeyFamily("otaPackagesData::<id>", "ota_package"),
        KeyFamily("dashboardTitles<id>", "dashboard"),
        KeyFamily("resourceInfo<id>", "resource"),
        KeyFamily("alarmTypes<tenant_id>", "alarm_types"),
        KeyFamily("qrCodeSettings<tenant_id>", "qr_code_settings"),
        KeyFamily("apiKeys_<value>", "api_key"),
        KeyFamily("aiModel_<tenant_id>_<id>", "ai_model"),
        KeyFamily("entityCount<tenant.id>_<ENTITY>", "", ("device", "asset")),
        KeyFamily("notificationSettings::<tenant_id>", "admin_settings"),
        KeyFamily("repositorySettings<tenant_id>", "admin_settings"),
        KeyFamily("securitySettings::securitySettings", "", ("admin_settings",)),
    ],
    {
        "SETTING": ["GENERAL", "QUICK_LINKS"],
        "ATTRIBUTE": ["active", "lastActivityTime", "inactivityTimeout"],
        "ENTITY": ["DEVICE", "ASSET"],
    },
)

MASTODON: Final = Application(
    "mastodon",
    "bigint",
    {
        "accounts": "id key, username text, domain text, url text",
        "custom_filters": "id key, account_id -> accounts, phrase text",
        "custom_filter_keywords": "id key, custom_filter_id -> custom_filters, keyword text",
        "blocks": "id key, account_id -> accounts, target_account_id -> accounts",
        "mutes": "id key, account_id -> accounts, target_account_id -> accounts",
        "follows": "id key, account_id -> accounts, target_account_id -> accounts",
        "follow_requests": "id key, account_id -> accounts, target_account_id -> accounts",
        "account_domain_blocks": "id key, account_id -> accounts, domain text",
        "custom_emojis": "id key, shortcode text, domain text",
        "statuses": "id key, account_id -> accounts, url text, uri text",
        "media_attachments": "id key, status_id -> statuses, account_id -> accounts",
        "mentions": "id key, status_id -> statuses, account_id -> accounts",
        "polls": "id key, status_id -> statuses, account_id -> accounts",
        "settings": "id key, var text",
        "site_uploads": "id key, var text",
        "ip_blocks": "id key, comment text",
        "unavailable_domains": "id key, domain text",
    },
    [
        KeyFamily("cache:filters:v3:<account_id>", "custom_filters", ("custom_filter_keywords",)),
        KeyFamily("cache:exclude_account_ids_for:<account_id>", "blocks", ("mutes",)),
        KeyFamily("cache:exclude_domains_for:<account_id>", "account_domain_blocks"),
        KeyFamily(
            "cache:relationship/<account_id>/<target_account_id>", "blocks", ("mutes", "follows", "follow_requests")
        ),
        KeyFamily("cache:followers_hash:<target_account_id>:local", "follows"),
        KeyFamily("cache:emoji:<shortcode>", "custom_emojis"),
        KeyFamily("cache:emoji:<shortcode>:<domain>", "custom_emojis"),
        KeyFamily("cache:mention:<username>", "accounts"),
        KeyFamily("cache:mention:<username>:<domain>", "accounts"),
        KeyFamily("cache:status:<url>", "statuses"),
        KeyFamily(f"cache:rails_settings_cached/{DIGEST}/<var>", "settings"),
        KeyFamily("cache:site_uploads/<var>", "site_uploads"),
        KeyFamily("cache:blocked_ips", "", ("ip_blocks",)),
        KeyFamily("cache:unavailable_domains", "", ("unavailable_domains",)),
        KeyFamily("cache:follow_recommendations/<account_id>", "follows", ("mutes",)),
        KeyFamily("cache:statuses/<id>", "statuses", ("media_attachments", "mentions", "polls", "accounts")),
    ],
)

OUTLINE: Final = Application(
    "outline",
    "uuid",
    {
        "teams": "id key, name text",
        "users": "id key, teamId -> teams, email text",
        "collections": "id key, teamId -> teams, name text",
        "documents": "id key, collectionId -> collections, title text",
        "groups": "id key, teamId -> teams, name text",
        "group_users": "userId -> users, groupId -> groups, kind text, PRIMARY KEY (userId, groupId, kind)",
        "group_permissions": "id key, groupId -> groups, collectionId -> collections",
        "user_permissions": "id key, userId -> users, documentId -> documents, collectionId -> collections",
        "comments": "id key, documentId -> documents, resolvedAt text",
        "revisions": "id key, documentId -> documents, title text",
        "webhook_subscriptions": "id key, teamId -> teams, url text",
    },
    [
        KeyFamily("cd:<id>", "collections"),
        KeyFamily("uc:<userId>", "user_permissions", ("users", "group_users", "group_permissions", "collections")),
        KeyFamily("ud:<userId>", "user_permissions", ("group_users", "group_permissions")),
        KeyFamily("whs:<teamId>", "webhook_subscriptions"),
        KeyFamily("count:Group:members:<groupId>", "group_users", ("users",)),
        KeyFamily("count:Document:unresolvedComments:<documentId>", "comments"),
        KeyFamily("diff:<id>", "revisions"),
        KeyFamily("unfurl:<teams.id>:https://<teams.name>", "", ()),
    ],
)

# Not of one application, but of many: small numbers as ids, of which each is in each table.
CLASSIC: Final = Application(
    "classic",
    "int",
    {
        "users": "id key, email text, username text",
        "categories": "id key, slug text",
        "posts": "id key, user_id -> users, category_id -> categories, slug text",
        "comments": "id key, post_id -> posts, user_id -> users",
        "likes": "id key, post_id -> posts, user_id -> users",
        "follows": "id key, follower_id -> users, followed_id -> users",
        "products": "id key, category_id -> categories, name text",
        "orders": "id key, user_id -> users",
        "order_items": "id key, order_id -> orders, product_id -> products",
        "django_session": "id key, session_key text",
        "blog_article": "id key, author_id -> users, slug text",
    },
    [
        KeyFamily("app:user:<id>", "users"),
        KeyFamily("app:users:by_email:<email>", "users"),
        KeyFamily("app:posts/<id>", "posts"),
        KeyFamily("app:post:<id>:comments", "posts", ("comments",)),
        KeyFamily("app:post:<id>:comments:count", "posts", ("comments",)),
        KeyFamily("app:post:<id>:likes_count", "posts", ("likes",)),
        KeyFamily("app:post:slug:<slug>", "posts"),
        KeyFamily("app:comments:post:<post_id>", "comments"),
        KeyFamily("app:posts:user:<user_id>", "posts"),
        KeyFamily("app:user:<user_id>:orders", "orders"),
        KeyFamily("app:user:<id>:followers", "users", ("follows",)),
        KeyFamily("app:user:<id>:timeline", "users", ("follows", "posts")),
        KeyFamily("app:category:<slug>:products", "categories", ("products",)),
        KeyFamily("app:order:<id>", "orders"),
        KeyFamily("app:order:<order_id>:items", "order_items"),
        KeyFamily("app:cart:<id>", "users", ("",)),
        KeyFamily("app:blog.article.<id>", "blog_article"),
        KeyFamily("app:product_<id>", "products"),
        KeyFamily("app:recommendations:<user_id>", "orders", ("products",)),
        KeyFamily("app:session:<session_key>", "django_session"),
        KeyFamily("app:rate_limit:<users.id>:posts", "", ()),
        KeyFamily("app:lock:order:<id>"),
    ],
)

# Zulip with Django's cache in Redis: small numbers as ids, and digests of what a column holds.
ZULIP: Final = Application(
    "zulip",
    "int",
    {
        "zerver_realm": "id key, string_id text, name text, first_visible_message_id int",
        "zerver_recipient": "id key, type_id int, type int",
        "zerver_userprofile": "id key, realm_id -> zerver_realm, email text, full_name text, api_key text, "
        "is_active boolean, is_bot boolean",
        "zerver_subscription": "id key, user_profile_id -> zerver_userprofile, recipient_id -> zerver_recipient",
        "zerver_stream": "id key, realm_id -> zerver_realm, name text, description text",
        "zerver_alertword": "id key, realm_id -> zerver_realm, user_profile_id -> zerver_userprofile, word text",
        "zerver_message": "id key, sender_id -> zerver_userprofile, content text",
        "zerver_reaction": "id key, message_id -> zerver_message, user_profile_id -> zerver_userprofile, "
        "emoji_name text",
        "zerver_submessage": "id key, message_id -> zerver_message, content text",
    },
    [
        KeyFamily(":1:display_recipient_dict:<id>", "zerver_recipient", ("zerver_subscription", "zerver_userprofile")),
        KeyFamily(":1:user_profile_by_email:<email|sha1>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:user_profile:<email|sha1>:<realm_id>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:bot_profile:<email|sha1>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:user_profile_by_id:<id>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:user_profile_by_api_key:<api_key>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:realm_user_dicts:<realm_id>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:active_user_ids:<realm_id>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:bot_dicts_in_realm:<realm_id>", "zerver_userprofile", ("zerver_realm",)),
        KeyFamily(":1:stream_by_realm_and_name:<realm_id>:<name|sha1>", "zerver_stream"),
        KeyFamily(":1:realm_alert_words:<string_id>", "zerver_realm", ("zerver_alertword",)),
        KeyFamily(":1:realm_first_visible_message_id:<string_id>", "zerver_realm"),
        KeyFamily(":1:message_dict:<id>", "zerver_message", ("zerver_reaction", "zerver_submessage")),
    ],
)

# Without foreign keys, and with random texts as ids.
MATTERMOST: Final = Application(
    "mattermost",
    "text",
    {
        "schemes": "id key, defaultchanneluserrole text",
        "teams": "id key, name text, schemeid => schemes, deleteat int",
        "users": "id key, username text, deleteat int",
        "roles": "id key, name text, permissions text",
        "teammembers": "teamid => teams, userid => users, deleteat int, PRIMARY KEY (teamid, userid)",
        "channels": "id key, teamid => teams, name text, displayname text, schemeid => schemes, deleteat int",
        "channelmembers": "channelid => channels, userid => users, roles text, notifyprops text, "
        "PRIMARY KEY (channelid, userid)",
        "bots": "userid => users, description text, PRIMARY KEY (userid)",
        "posts": "id key, channelid => channels, message text, type text, ispinned boolean, deleteat int",
        "reactions": "userid => users, postid => posts, emojiname text, PRIMARY KEY (postid, userid, emojiname)",
        "fileinfo": "id key, postid => posts, name text, size int, deleteat int",
        "incomingwebhooks": "id key, displayname text, deleteat int",
        "emoji": "id key, name text, deleteat int",
        "termsofservice": "id key, text text, createat int",
    },
    [
        KeyFamily("Reaction:<postid>", "reactions"),
        KeyFamily("Role:<name>", "roles"),
        KeyFamily("Scheme:<id>", "schemes"),
        KeyFamily("FileInfo:<postid>", "fileinfo"),
        KeyFamily("FileInfo:<postid>_deleted", "fileinfo"),
        KeyFamily("FileInfo:storage_usage", "", ("fileinfo",)),
        KeyFamily("FileInfo:storage_usage_deleted", "", ("fileinfo",)),
        KeyFamily("Webhook:<id>", "incomingwebhooks"),
        KeyFamily("EmojiById:<id>", "emoji"),
        KeyFamily("EmojiByName:<name>", "emoji"),
        KeyFamily("ChannelPinnedPostsCounts:<id>", "channels", ("posts",)),
        KeyFamily("ChannelMemberCounts:<id>", "channels", ("channelmembers", "users")),
        KeyFamily("ChannelGuestsCount:<id>", "channels", ("channelmembers", "users")),
        KeyFamily("channelById:<id>", "channels"),
        KeyFamily("ChannelByName:<teamid><name>", "channels"),
        KeyFamily("ChannelMembersForUser:<id>", "users", ("channelmembers", "channels")),
        KeyFamily("ChannelMembersForUser:<id>_deleted", "users", ("channelmembers", "channels")),
        KeyFamily("ChannnelMembersNotifyProps:<channelid>", "channelmembers"),
        KeyFamily("LastPost:<channelid>30", "posts"),
        KeyFamily("LastPost:<channelid>60", "posts"),
        KeyFamily("LastPostTime:<channelid>", "posts"),
        KeyFamily("PostsUsage:posts_usage", "", ("posts",)),
        KeyFamily("TermsOfService:<id>", "termsofservice"),
        KeyFamily("TermsOfService:latest", "", ("termsofservice",)),
        KeyFamily("AllUserProfiles:ALL", "", ("users", "bots")),
        KeyFamily("UserProfileByIds:<id>", "users", ("bots",)),
        KeyFamily("ProfilesInChannel:<channelid>", "channelmembers", ("users", "bots")),
        KeyFamily("Team:<id>", "users", ("teammembers", "teams")),
    ],
)
