-- somebody reacts, and takes it back
INSERT INTO reactions VALUES ('eva', 'p', 'wave');
DELETE FROM reactions WHERE userid = 'bob';

-- a role may do more: the whole cache of permissions
UPDATE roles SET permissions = 'a c' WHERE name = 'channel_user';

-- a scheme gives another role: of all users, some are in no channel with this scheme
-- in vain: 2
UPDATE schemes SET defaultchanneluserrole = 'other' WHERE id = 's';

-- a file is uploaded, and then put into a post
INSERT INTO fileinfo VALUES ('i', '', 'd.png', 40);
UPDATE fileinfo SET postid = 'q' WHERE id = 'i';

-- a file is deleted softly
UPDATE fileinfo SET deleteat = 5 WHERE id = 'f';

-- a webhook is deleted softly
UPDATE incomingwebhooks SET deleteat = 5 WHERE id = 'w';

-- an emoji takes another's name
UPDATE emoji SET deleteat = 5 WHERE id = 'k';
INSERT INTO emoji VALUES ('m', 'cat');

-- a post is pinned
UPDATE posts SET ispinned = true, updateat = 2 WHERE id = 'q';

-- a post is edited: the old one is kept as a deleted row
INSERT INTO posts VALUES ('q1', 'c', 'Bye', '', true, 2, 3);
UPDATE posts SET message = 'Good bye', updateat = 3 WHERE id = 'q';

-- a pinned post is deleted
UPDATE posts SET deleteat = 5, updateat = 5 WHERE id = 'p';

-- somebody reads
UPDATE channelmembers SET lastviewedat = 9 WHERE userid = 'ada';

-- somebody wants no mail
UPDATE channelmembers SET notifyprops = '{"email": false}' WHERE userid = 'ada' AND channelid = 'c';

-- a guest becomes a member
UPDATE channelmembers SET schemeguest = false WHERE userid = 'bob' AND channelid = 'd';

-- somebody joins, and somebody leaves
INSERT INTO channelmembers (channelid, userid) VALUES ('e', 'ada');
DELETE FROM channelmembers WHERE channelid = 'c' AND userid = 'bob';

-- a channel is renamed
UPDATE channels SET name = 'city' WHERE id = 'c';

-- a channel is archived: entries with archived channels don't tell which of them are
-- in vain: 2
UPDATE channels SET deleteat = 5 WHERE id = 'd';

-- a channel gets a scheme
UPDATE channels SET schemeid = 'r' WHERE id = 'c';

-- a channel moves to another team
UPDATE channels SET teamid = 'o' WHERE id = 'c';

-- somebody is renamed
UPDATE users SET username = 'robert' WHERE id = 'bob';

-- somebody is switched off
UPDATE users SET deleteat = 5 WHERE id = 'eva';

-- a bot is described
UPDATE bots SET description = 'The bot' WHERE userid = 'bot';

-- somebody leaves a team
UPDATE teammembers SET deleteat = 5 WHERE userid = 'bob';

-- a team has no scheme any more: its channel, of which these are members, has been archived
-- in vain: 2
UPDATE teams SET schemeid = NULL WHERE id = 't';

-- a team is archived: somebody has left it already
-- in vain: 1
UPDATE teams SET deleteat = 5 WHERE id = 't';

-- new terms
INSERT INTO termsofservice VALUES ('c', 'Be kindest', 3);

-- a channel is deleted for good, with its members and posts
DELETE FROM posts WHERE channelid = 'e';
DELETE FROM channelmembers WHERE channelid = 'e';
DELETE FROM channels WHERE id = 'e';

-- somebody is deleted for good, who had left the team, and is a member only of what was archived
-- in vain: 2
DELETE FROM channelmembers WHERE userid = 'bob';
DELETE FROM teammembers WHERE userid = 'bob';
DELETE FROM users WHERE id = 'bob';
