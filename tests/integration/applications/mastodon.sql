-- The tables of Mastodon whose rows its caches show: their keys, and the columns that matter.
CREATE TABLE accounts (
    id bigint PRIMARY KEY, username text NOT NULL, domain text, uri text NOT NULL, url text, note text NOT NULL DEFAULT '');
CREATE TABLE statuses (
    id bigint PRIMARY KEY, account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE, uri text UNIQUE, url text,
    text text NOT NULL DEFAULT '', reblog_of_id bigint REFERENCES statuses ON DELETE CASCADE);
CREATE INDEX ON statuses (reblog_of_id, account_id);
CREATE TABLE custom_filters (
    id bigint PRIMARY KEY, account_id bigint REFERENCES accounts ON DELETE CASCADE, phrase text NOT NULL);
CREATE TABLE custom_filter_keywords (
    id bigint PRIMARY KEY, custom_filter_id bigint NOT NULL REFERENCES custom_filters ON DELETE CASCADE,
    keyword text NOT NULL);
CREATE TABLE custom_filter_statuses (
    id bigint PRIMARY KEY, custom_filter_id bigint NOT NULL REFERENCES custom_filters ON DELETE CASCADE,
    status_id bigint NOT NULL REFERENCES statuses ON DELETE CASCADE);
CREATE TABLE blocks (
    id bigint PRIMARY KEY, account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE mutes (
    id bigint PRIMARY KEY, account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE follows (
    id bigint PRIMARY KEY, account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE follow_requests (
    id bigint PRIMARY KEY, account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE account_notes (
    id bigint PRIMARY KEY, account_id bigint REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint REFERENCES accounts ON DELETE CASCADE, comment text NOT NULL);
CREATE TABLE account_pins (
    id bigint PRIMARY KEY, account_id bigint REFERENCES accounts ON DELETE CASCADE,
    target_account_id bigint REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE account_domain_blocks (
    id bigint PRIMARY KEY, domain text, account_id bigint REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE custom_emojis (
    id bigint PRIMARY KEY, shortcode text NOT NULL, domain text, disabled boolean NOT NULL DEFAULT false,
    UNIQUE (shortcode, domain));
CREATE TABLE settings (id bigint PRIMARY KEY, var text NOT NULL UNIQUE, value text);
CREATE TABLE site_uploads (id bigint PRIMARY KEY, var text NOT NULL UNIQUE, file_file_name text);
CREATE TABLE ip_blocks (id bigint PRIMARY KEY, ip inet NOT NULL UNIQUE, severity int NOT NULL DEFAULT 0);
CREATE TABLE unavailable_domains (id bigint PRIMARY KEY, domain text NOT NULL UNIQUE);
CREATE TABLE media_attachments (
    id bigint PRIMARY KEY, status_id bigint REFERENCES statuses ON DELETE SET NULL, description text);
CREATE TABLE mentions (
    id bigint PRIMARY KEY, status_id bigint NOT NULL REFERENCES statuses ON DELETE CASCADE,
    account_id bigint NOT NULL REFERENCES accounts ON DELETE CASCADE);
CREATE TABLE polls (
    id bigint PRIMARY KEY, status_id bigint NOT NULL REFERENCES statuses ON DELETE CASCADE,
    cached_tallies bigint[] NOT NULL DEFAULT '{}');
CREATE TABLE statuses_tags (
    status_id bigint REFERENCES statuses ON DELETE CASCADE, tag_id bigint, PRIMARY KEY (tag_id, status_id));
CREATE TABLE preview_cards_statuses (preview_card_id bigint, status_id bigint, PRIMARY KEY (status_id, preview_card_id));
CREATE TABLE status_stats (
    id bigint PRIMARY KEY, status_id bigint NOT NULL UNIQUE REFERENCES statuses ON DELETE CASCADE,
    favourites_count bigint NOT NULL DEFAULT 0);

INSERT INTO accounts VALUES
    (1, 'Ada', NULL, ''), (2, 'eva', NULL, ''), (3, 'Bob', 'Example.org', 'https://example.org/users/bob'),
    (4, 'ann', 'example.org', 'https://example.org/users/ann'), (5, 'oto', 'example.com', 'https://example.com/oto');
INSERT INTO statuses VALUES
    (11, 1, NULL, NULL, 'Hello', NULL), (12, 3, 'https://Example.org/12', 'https://example.org/@bob/12', 'Hi', NULL),
    (13, 2, NULL, NULL, '', 11), (14, 2, NULL, NULL, '', 12), (15, 4, 'https://example.org/15', NULL, 'Tea', NULL);
INSERT INTO custom_filters VALUES (1, 1, 'coffee'), (2, 2, 'coffee');
INSERT INTO custom_filter_keywords VALUES (1, 1, 'coffee'), (2, 2, 'coffee');
INSERT INTO custom_filter_statuses VALUES (1, 1, 12);
INSERT INTO blocks VALUES (1, 1, 5);
INSERT INTO mutes VALUES (1, 1, 2), (2, 2, 4);
INSERT INTO follows VALUES (1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 5, 1), (5, 1, 3), (6, 3, 2);
INSERT INTO account_notes VALUES (1, 1, 3, 'a friend');
INSERT INTO account_pins VALUES (1, 1, 3);
INSERT INTO account_domain_blocks VALUES (1, 'example.net', 1), (2, 'example.net', 2);
INSERT INTO custom_emojis VALUES (1, 'Blob', NULL), (2, 'blob', 'Example.org'), (3, 'tea', 'example.org');
INSERT INTO settings VALUES (1, 'site_title', 'Here'), (2, 'theme', 'dark');
INSERT INTO site_uploads VALUES (1, 'thumbnail', 'a.png'), (2, 'mascot', 'b.png');
INSERT INTO ip_blocks VALUES (1, '192.0.2.0/24');
INSERT INTO unavailable_domains VALUES (1, 'example.net');
INSERT INTO media_attachments VALUES (1, 11, 'a'), (2, 15, 'b');
INSERT INTO mentions VALUES (1, 12, 1);
INSERT INTO polls VALUES (1, 11), (2, 15);
INSERT INTO statuses_tags VALUES (11, 1), (15, 1);
INSERT INTO preview_cards_statuses VALUES (1, 12);
INSERT INTO status_stats VALUES (1, 11), (2, 15);

-- A status as it is cached: with its parts, without its account.
CREATE VIEW whole AS
SELECT statuses.id, concat_ws(' ', statuses,
    (SELECT string_agg(m::text, ',' ORDER BY id) FROM media_attachments m WHERE status_id = statuses.id),
    (SELECT string_agg(m::text, ',' ORDER BY id) FROM mentions m WHERE status_id = statuses.id),
    (SELECT string_agg(p::text, ',' ORDER BY id) FROM polls p WHERE status_id = statuses.id),
    (SELECT string_agg(t::text, ',' ORDER BY tag_id) FROM statuses_tags t WHERE status_id = statuses.id),
    (SELECT string_agg(c::text, ',') FROM preview_cards_statuses c WHERE status_id = statuses.id),
    (SELECT s::text FROM status_stats s WHERE status_id = statuses.id)) AS value
FROM statuses;

-- What the application would store under which key.
CREATE VIEW cached (key, value) AS
SELECT 'cache:filters:v3:' || a.id,
    (SELECT string_agg(concat_ws(' ', f,
        (SELECT string_agg(keyword, ',' ORDER BY k.id) FROM custom_filter_keywords k WHERE custom_filter_id = f.id),
        (SELECT string_agg(status_id::text, ',') FROM custom_filter_statuses s WHERE custom_filter_id = f.id)
    ), ';' ORDER BY f.id) FROM custom_filters f WHERE account_id = a.id) FROM accounts a
UNION ALL SELECT 'cache:exclude_account_ids_for:' || a.id, (
    SELECT string_agg(id::text, ',' ORDER BY id) FROM (
        SELECT target_account_id FROM blocks WHERE account_id = a.id UNION
        SELECT account_id FROM blocks WHERE target_account_id = a.id UNION
        SELECT target_account_id FROM mutes WHERE account_id = a.id) AS excluded (id)) FROM accounts a
UNION ALL SELECT 'cache:exclude_domains_for:' || a.id,
    (SELECT string_agg(domain, ',' ORDER BY domain) FROM account_domain_blocks WHERE account_id = a.id) FROM accounts a
UNION ALL SELECT 'cache:relationship/' || a.id || '/' || b.id, concat_ws(',',
    (SELECT 'follows' FROM follows WHERE (account_id, target_account_id) = (a.id, b.id)),
    (SELECT 'followed' FROM follows WHERE (target_account_id, account_id) = (a.id, b.id)),
    (SELECT 'blocks' FROM blocks WHERE (account_id, target_account_id) = (a.id, b.id)),
    (SELECT 'blocked' FROM blocks WHERE (target_account_id, account_id) = (a.id, b.id)),
    (SELECT 'mutes' FROM mutes WHERE (account_id, target_account_id) = (a.id, b.id)),
    (SELECT 'asks' FROM follow_requests WHERE (account_id, target_account_id) = (a.id, b.id)),
    (SELECT 'asked' FROM follow_requests WHERE (target_account_id, account_id) = (a.id, b.id)),
    (SELECT comment FROM account_notes WHERE (account_id, target_account_id) = (a.id, b.id)),
    (SELECT 'endorses' FROM account_pins WHERE (account_id, target_account_id) = (a.id, b.id)))
    FROM accounts a JOIN accounts b ON a.id <> b.id
UNION ALL SELECT 'cache:followers_hash:' || target_account_id || ':local', string_agg(account_id::text, ',' ORDER BY a.id)
    FROM follows JOIN accounts a ON a.id = account_id WHERE domain IS NULL GROUP BY target_account_id
UNION ALL SELECT 'cache:followers_hash:' || target_account_id || ':https://' || lower(domain) || '/',
    string_agg(account_id::text, ',' ORDER BY a.id)
    FROM follows JOIN accounts a ON a.id = account_id WHERE domain IS NOT NULL GROUP BY target_account_id, lower(domain)
UNION ALL SELECT 'cache:emoji:' || lower(concat_ws(':', shortcode, domain)), e::text FROM custom_emojis e
UNION ALL SELECT 'cache:mention:' || lower(concat_ws(':', username, domain)), concat_ws(' ', id, username, domain, uri, url)
    FROM accounts
UNION ALL SELECT 'cache:status:' || lower(url), s::text FROM statuses s WHERE url IS NOT NULL
UNION ALL SELECT 'cache:status:' || lower(uri), s::text FROM statuses s WHERE uri IS NOT NULL AND uri IS DISTINCT FROM url
UNION ALL SELECT 'cache:rails_settings_cached/0123456789abcdef0123456789abcdef/' || var, value FROM settings
UNION ALL SELECT 'cache:site_uploads/' || var, file_file_name FROM site_uploads
UNION ALL SELECT 'cache:blocked_ips', string_agg(ip::text, ',' ORDER BY ip) FROM ip_blocks
UNION ALL SELECT 'cache:unavailable_domains', string_agg(domain, ',' ORDER BY domain) FROM unavailable_domains
UNION ALL SELECT 'cache:follow_recommendations/' || a.id, (
    SELECT string_agg(b.id::text, ',' ORDER BY b.id) FROM accounts b WHERE b.domain IS NULL AND b.id NOT IN (
        SELECT target_account_id FROM follows WHERE account_id = a.id UNION
        SELECT target_account_id FROM blocks WHERE account_id = a.id UNION
        SELECT target_account_id FROM mutes WHERE account_id = a.id)) FROM accounts a WHERE domain IS NULL AND id < 3
UNION ALL SELECT 'cache:statuses/' || s.id, concat_ws(' boosts ', whole.value, boosted.value)
    FROM statuses s JOIN whole USING (id) LEFT JOIN whole boosted ON boosted.id = s.reblog_of_id;
