-- The tables of Mattermost whose rows its caches show: their keys, and the columns that matter. It has no foreign keys.
CREATE TABLE reactions (userid text, postid text, emojiname text, PRIMARY KEY (postid, userid, emojiname));
CREATE TABLE roles (id text PRIMARY KEY, name text NOT NULL UNIQUE, permissions text);
CREATE TABLE schemes (id text PRIMARY KEY, defaultchanneluserrole text);
CREATE TABLE teams (id text PRIMARY KEY, name text NOT NULL, schemeid text, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE teammembers (teamid text, userid text, deleteat bigint NOT NULL DEFAULT 0, PRIMARY KEY (teamid, userid));
CREATE TABLE channels (
    id text PRIMARY KEY, teamid text NOT NULL, name text NOT NULL, displayname text, schemeid text,
    deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE channelmembers (
    channelid text, userid text, roles text, schemeguest boolean, schemeuser boolean DEFAULT true, schemeadmin boolean,
    notifyprops jsonb, lastviewedat bigint NOT NULL DEFAULT 0, PRIMARY KEY (channelid, userid));
CREATE TABLE users (id text PRIMARY KEY, username text NOT NULL, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE bots (userid text PRIMARY KEY, description text);
CREATE TABLE posts (
    id text PRIMARY KEY, channelid text NOT NULL, message text, type text NOT NULL DEFAULT '',
    ispinned boolean NOT NULL DEFAULT false, updateat bigint NOT NULL DEFAULT 1, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE fileinfo (
    id text PRIMARY KEY, postid text NOT NULL, name text, size bigint NOT NULL, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE incomingwebhooks (id text PRIMARY KEY, displayname text, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE emoji (id text PRIMARY KEY, name text NOT NULL, deleteat bigint NOT NULL DEFAULT 0);
CREATE TABLE termsofservice (id text PRIMARY KEY, text text, createat bigint NOT NULL);

INSERT INTO schemes VALUES ('s', 'channel_user'), ('r', 'quiet_user');
INSERT INTO roles VALUES ('1', 'channel_admin', 'a b'), ('2', 'channel_user', 'a');
INSERT INTO teams VALUES ('t', 'Team', 's'), ('o', 'Others', NULL);
INSERT INTO users VALUES ('ada', 'ada'), ('bob', 'bob'), ('eva', 'eva'), ('bot', 'bot');
INSERT INTO bots VALUES ('bot', 'A bot');
INSERT INTO teammembers VALUES ('t', 'ada'), ('t', 'bob'), ('o', 'eva'), ('t', 'bot');
INSERT INTO channels VALUES ('c', 't', 'town', 'Town'), ('d', 't', 'dev', 'Dev'), ('e', 'o', 'else', 'Else');
INSERT INTO channelmembers (channelid, userid, schemeguest) VALUES
    ('c', 'ada', false), ('c', 'bob', false), ('c', 'bot', NULL), ('d', 'ada', NULL), ('d', 'bob', true),
    ('e', 'eva', NULL);
INSERT INTO posts (id, channelid, message, type, ispinned) VALUES
    ('p', 'c', 'Hello', '', true), ('q', 'c', 'Bye', '', false), ('x', 'd', 'Tea', '', true),
    ('y', 'd', 'joined', 'system', false);
INSERT INTO reactions VALUES ('ada', 'p', 'smile'), ('bob', 'q', 'wave');
INSERT INTO fileinfo VALUES ('f', 'p', 'a.png', 10), ('g', 'x', 'b.png', 20), ('h', '', 'c.png', 30);
INSERT INTO incomingwebhooks VALUES ('w', 'Hook'), ('v', 'Other');
INSERT INTO emoji VALUES ('k', 'cat'), ('l', 'dog');
INSERT INTO termsofservice VALUES ('a', 'Be kind', 1), ('b', 'Be kinder', 2);

-- What the application would store under which key. Of no rows, a count is 0, also for a channel that is gone.
CREATE VIEW cached (key, value) AS
SELECT 'Reaction:' || postid, string_agg(userid || emojiname, ',' ORDER BY userid, emojiname)
    FROM reactions GROUP BY postid
UNION ALL SELECT 'Role:' || name, permissions FROM roles
UNION ALL SELECT 'RolePermission:' || string_agg(name, '/' ORDER BY name),
    string_agg(permissions, ';' ORDER BY name)
    || (SELECT string_agg(schemes.defaultchanneluserrole, ',' ORDER BY teams.id)
        FROM teams JOIN schemes ON schemes.id = schemeid)
    FROM roles
UNION ALL SELECT 'Scheme:' || id, defaultchanneluserrole FROM schemes
UNION ALL SELECT 'FileInfo:' || postid, string_agg(name, ',' ORDER BY id)
    FROM fileinfo WHERE deleteat = 0 AND postid <> '' GROUP BY postid
UNION ALL SELECT 'FileInfo:' || postid || '_deleted', string_agg(name || deleteat, ',' ORDER BY id)
    FROM fileinfo WHERE postid <> '' GROUP BY postid
UNION ALL SELECT 'FileInfo:storage_usage', sum(size)::text FROM fileinfo WHERE deleteat = 0
UNION ALL SELECT 'FileInfo:storage_usage_deleted', sum(size)::text FROM fileinfo
UNION ALL SELECT 'Webhook:' || id, displayname FROM incomingwebhooks WHERE deleteat = 0
UNION ALL SELECT 'EmojiById:' || id, name FROM emoji WHERE deleteat = 0
UNION ALL SELECT 'EmojiByName:' || name, min(id) FROM emoji WHERE deleteat = 0 GROUP BY name
UNION ALL SELECT 'ChannelPinnedPostsCounts:' || channels.id, nullif(count(posts.id), 0)::text
    FROM channels LEFT JOIN posts ON channelid = channels.id AND ispinned AND posts.deleteat = 0 GROUP BY channels.id
UNION ALL SELECT 'ChannelMemberCounts:' || channels.id, nullif(count(users.id), 0)::text
    FROM channels LEFT JOIN channelmembers ON channelid = channels.id
    LEFT JOIN users ON users.id = userid AND users.deleteat = 0 GROUP BY channels.id
UNION ALL SELECT 'ChannelGuestsCount:' || channels.id, nullif(count(users.id), 0)::text
    FROM channels LEFT JOIN channelmembers ON channelid = channels.id AND schemeguest
    LEFT JOIN users ON users.id = userid AND users.deleteat = 0 GROUP BY channels.id
UNION ALL SELECT 'channelById:' || id, to_jsonb(channels)::text FROM channels
UNION ALL SELECT 'ChannelByName:' || teamid || name, to_jsonb(channels)::text FROM channels
UNION ALL SELECT 'ChannelMembersForUser:' || users.id || suffix, string_agg(
        channels.id || concat(roles, schemeguest, schemeadmin, s.defaultchanneluserrole, ts.defaultchanneluserrole),
        ',' ORDER BY channels.id)
    FROM users CROSS JOIN (VALUES (''), ('_deleted')) AS suffixes (suffix)
    LEFT JOIN channelmembers ON userid = users.id
    LEFT JOIN channels ON channels.id = channelid AND (channels.deleteat = 0 OR suffix <> '')
    LEFT JOIN teams ON teams.id = teamid LEFT JOIN schemes s ON s.id = channels.schemeid
    LEFT JOIN schemes ts ON ts.id = teams.schemeid
    GROUP BY users.id, suffix
UNION ALL SELECT 'ChannnelMembersNotifyProps:' || channelid,
    string_agg(userid || coalesce(notifyprops::text, ''), ',' ORDER BY userid)
    FROM channelmembers GROUP BY channelid
UNION ALL SELECT 'LastPost:' || channelid || n, string_agg(posts::text, ',' ORDER BY id)
    FROM posts CROSS JOIN (VALUES (30), (60)) AS limits (n) GROUP BY channelid, n
UNION ALL SELECT 'LastPostTime:' || channelid, max(updateat)::text FROM posts GROUP BY channelid
UNION ALL SELECT 'PostsUsage:posts_usage', count(*)::text FROM posts WHERE deleteat = 0 AND type = ''
UNION ALL SELECT 'TermsOfService:' || id, text FROM termsofservice
UNION ALL SELECT 'TermsOfService:latest', (SELECT text FROM termsofservice ORDER BY createat DESC LIMIT 1)
UNION ALL SELECT 'AllUserProfiles:ALL',
    string_agg(username || users.deleteat || coalesce(description, ''), ',' ORDER BY id)
    FROM users LEFT JOIN bots ON userid = id
UNION ALL SELECT 'UserProfileByIds:' || id, username || users.deleteat || coalesce(description, '')
    FROM users LEFT JOIN bots ON userid = id
UNION ALL SELECT 'ProfilesInChannel:' || channelid,
    string_agg(username || users.deleteat || coalesce(description, ''), ',' ORDER BY users.id)
    FROM channelmembers JOIN users ON users.id = channelmembers.userid
    LEFT JOIN bots ON bots.userid = users.id GROUP BY channelid
UNION ALL SELECT 'Team:' || users.id, string_agg(teams.id, ',' ORDER BY teams.id)
    FROM users LEFT JOIN teammembers ON userid = users.id AND teammembers.deleteat = 0
    LEFT JOIN teams ON teams.id = teamid AND teams.deleteat = 0 GROUP BY users.id;
